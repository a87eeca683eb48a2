from contextlib import AbstractContextManager

from pyramid.request import Request

def bootstrap(config_uri: str) -> AbstractContextManager[dict[str, Request]]: ...
