"""The one rule by which a path, URI or model's name that a user gives is refused: it carries a credential.

What a user gives is logged, and stored in plans, manifests and run documents, so a secret in it would be published with
the data. Credentials come from the environment or the instance's role. The rule looks at places, not at meaning:

- before the "@" of an address: `s3://key:secret@bucket`, `https://TOKEN@host`. A name without a colon may stand there
  where the protocol needs one: a container (`abfs://container@account`), a login (`sftp://user@host`);
- a port that is no number, as in `s3://key:sec/ret@bucket`, where the secret holds a slash;
- names of parameters after "?", "&", ";" or "#": token, signature, api_key, X-Amz-..., and the like; and a long
  parameter without any name;
- in each address of a chain (`simplecache::https://user:pw@host`) or a parameter, and where it is percent-encoded;
- `user:password@host/...` without a protocol.

A secret that is a part of the path itself cannot be told from a name.
"""

import os
import re
from urllib.parse import unquote

from pcm.errors import InputError

#: Protocols whose addresses may have a name before "@": a container, a login or a share.
_NAME_BEFORE_AT = frozenset(["abfs", "abfss", "wasb", "wasbs", "sftp", "ssh", "ftp", "hdfs", "webhdfs", "smb"])

#: Of a parameter's name in small letters, letters and digits alone.
_SECRET_NAME = re.compile(
    r"sig|token|secret|passw|passphrase|pwd|credential|accesskey|apikey|keypair|session|jwt|bearer|authori|authent|authk"
    r"|^(x?amz|x?goog)|(auth|key)$|^(pass|pw|code|policy)$"
)
#: A parameter without a name is taken for a secret from this length on.
_LONG_PARAMETER = 16

_PARAMETER = re.compile(r"[?&;#]([^?&;#]*)")
_PROTOCOL = re.compile(r"[a-z][a-z0-9+.-]*", re.IGNORECASE)


def refuse_credentials(uri: str) -> None:
    """Raises InputError, which shows none of the secret, for a path, URI or name that carries a credential."""
    if any(_carries_credential(text) for text in {uri, unquote(uri), unquote(unquote(uri))}):
        protocol = _PROTOCOL.fullmatch(uri.partition("://")[0].rpartition("::")[2]) if "://" in uri else None
        shown = f"{protocol[0]}://..." if protocol else "...@..."
        raise InputError(
            f"{shown}: the URI carries a credential, and URIs are logged and stored with the dataset; "
            "give credentials by the environment or the instance's role"
        )


def refuse_credentials_in(request: object) -> None:
    """`refuse_credentials` of every text and path, alone or in a list or tuple, among the fields of a dataclass.

    For a request, before its first field is used: what is opened last is refused before anything is written.
    """
    for value in vars(request).values():
        for text in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(text, (str, os.PathLike)):
                refuse_credentials(os.fsdecode(text))


def _carries_credential(uri: str) -> bool:
    if "://" not in uri:
        return re.match(r"(\w+:)?/{0,2}[^/:@]+:[^/@]+@[^/]", uri) is not None
    addresses = re.finditer(rf"({_PROTOCOL.pattern}|)://", uri, re.IGNORECASE)
    return any(_address_carries_credential(found[1], uri[found.end() :].partition("::")[0]) for found in addresses)


def _address_carries_credential(protocol: str, rest: str) -> bool:
    address = re.split(r"[/?#]", rest, maxsplit=1)[0]
    name, at, host = address.rpartition("@")
    if at and (":" in name or protocol.lower() not in _NAME_BEFORE_AT):
        return True
    port = host.rpartition(":")[2] if ":" in host else ""
    if port and not port.isdecimal() and not host.startswith(("arn:", "[")):
        return True
    return any(map(_is_secret, _PARAMETER.findall(rest)))


def _is_secret(parameter: str) -> bool:
    name, equals, _ = parameter.partition("=")
    if not equals:
        return len(name) >= _LONG_PARAMETER and "/" not in name
    return _SECRET_NAME.search(re.sub(r"[^a-z0-9]", "", name.lower())) is not None
