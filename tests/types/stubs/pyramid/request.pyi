from typing import Any

class Request:
    environ: dict[str, Any]
    params: dict[str, str]

    # What config.include() has added, and is known of nothing but its name.
    def __getattr__(self, name: str) -> Any: ...

def apply_request_extensions(request: Request) -> None: ...
