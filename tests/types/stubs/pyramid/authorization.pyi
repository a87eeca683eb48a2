from collections.abc import Sequence

Allow: str
Everyone: str

class ACLHelper:
    def permits(self, context: object, principals: Sequence[str], permission: str) -> object: ...
