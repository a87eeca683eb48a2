from collections.abc import Mapping
from contextlib import AbstractContextManager

from pyramid.config import Configurator
from pyramid.request import Request

class DummyRequest(Request):
    def __init__(self, params: Mapping[str, str] = {}, *, tm: object, environ: Mapping[str, object]) -> None: ...

def testConfig(*, settings: Mapping[str, object]) -> AbstractContextManager[Configurator]: ...
