// Shows what changed since the page was loaded, and copies the command.  The page works without this script.
'use strict';

const PAUSE = 1500; // milliseconds

document.documentElement.classList.add('with-js');

function replaceChanged(fresh) {
  for (const part of fresh.querySelectorAll('[data-live]')) {
    const shown = document.getElementById(part.id);
    if (!shown || shown.innerHTML === part.innerHTML) continue;
    const focused = shown.contains(document.activeElement) ? document.activeElement.id : '';
    shown.innerHTML = part.innerHTML;
    shown.classList.add('changed');
    setTimeout(() => shown.classList.remove('changed'), 900);
    if (focused) document.getElementById(focused)?.focus();
  }
}

async function refresh(live) {
  if (document.hidden) return;
  try {
    const response = await fetch(live.dataset.liveUrl);
    if (!response.ok) throw new Error(response.statusText);
    replaceChanged(new DOMParser().parseFromString(await response.text(), 'text/html'));
    document.body.classList.remove('stale');
  } catch {
    document.body.classList.add('stale'); // the demo has ended; what is shown is old
  }
}

async function keepFresh(live) {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, PAUSE));
    await refresh(live);
  }
}

document.addEventListener('click', async (event) => {
  const button = event.target.closest('[data-copy]');
  if (!button) return;
  const text = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(text.textContent);
    button.textContent = 'Copied';
    setTimeout(() => { button.textContent = 'Copy'; }, 1500);
  } catch {
    getSelection().selectAllChildren(text); // not allowed by this browser; Ctrl-C is
  }
});

const live = document.getElementById('live-parts');
if (live) keepFresh(live);
