"""Which failures of a store are worth another try, which are the user's to mend, and how long to be patient.

Errors are told apart by status, code, errno and type name: no client library has to be imported for a run on a local
disk, and gcsfs may not be installed. What is shown of an error is its code or type alone; texts of client libraries
may quote a request.
"""

import errno
import gc
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal, TypeVar

from cluster.numbers import duration
from pcm.errors import InputError, StoreFailure
from pcm.line_timer import LineTimer

log = logging.getLogger(__name__)

T = TypeVar("T")
Kind = Literal["transient", "no credentials", "full", "refused", "no bucket", "bad request", "other"]

RETRY_SECONDS = 300.0
#: For credentials that a machine's metadata service did not give when it was asked. Asking takes some 2 s.
CREDENTIALS_SECONDS = 25.0
#: A store does not know the job that uses it.
RERUN = "run the same command again (training and sweeps with --resume)"
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 15.0  # seconds

_TRANSIENT_CODES = frozenset(
    {
        "BandwidthLimitExceeded", "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError",
        "InternalFailure", "OperationAborted", "PriorRequestNotComplete", "RequestLimitExceeded", "RequestThrottled",
        "RequestThrottledException", "RequestTimeout", "RequestTimeoutException", "ServiceUnavailable", "SlowDown",
        "SlowDownRead", "SlowDownWrite", "ThrottledException", "Throttling", "ThrottlingException",
        "TooManyRequests", "TooManyRequestsException", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch",
    }
)  # fmt: skip
_FULL_CODES = frozenset(
    {"InsufficientStorage", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull"}
)  # fmt: skip
_REFUSED_CODES = frozenset(
    {
        "AccessDenied", "AccountProblem", "AllAccessDisabled", "AuthorizationHeaderMalformed", "ExpiredToken",
        "ExpiredTokenException", "InvalidAccessKeyId", "InvalidObjectState", "InvalidSecurity", "InvalidToken",
        "NotSignedUp", "RequestTimeTooSkewed", "SignatureDoesNotMatch", "UnauthorizedAccess",
    }
)  # fmt: skip
#: Of botocore, aiohttp, urllib3, fsspec, gcsfs, google.auth and Python; a subclass counts as its base.
_TRANSIENT_TYPES = frozenset(
    {
        "ChecksumError", "ClientConnectionError", "ClientPayloadError", "ConnectionError", "CredentialRetrievalError",
        "FlexibleChecksumError", "HTTPClientError", "IncompleteRead", "IncompleteReadError", "MetadataRetrievalError",
        "ResponseParserError", "TimeoutError", "TransportError",
    }
)  # fmt: skip
_REFUSED_TYPES = frozenset(
    {
        "ConfigNotFound", "ConfigParseError", "DefaultCredentialsError", "InvalidConfigError", "LoginError",
        "NoAuthTokenError", "PartialCredentialsError", "PermissionError", "ProfileNotFound", "SSOError",
        "TokenRetrievalError", "UnauthorizedSSOTokenError",
    }
)  # fmt: skip
#: Of botocore and of azure.core: there are none, or a metadata service was once too late with them.
_NO_CREDENTIALS_TYPES = frozenset({"ClientAuthenticationError", "NoCredentialsError"})
_TRANSIENT_ERRNO = frozenset(
    {
        errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH,
        errno.EINTR, errno.EIO, errno.EMFILE, errno.ENETDOWN, errno.ENETUNREACH, errno.ENFILE, errno.ENOTCONN,
        errno.EPIPE, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT,
    }
)  # fmt: skip
FULL_ERRNO = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED_ERRNO = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
#: With FileNotFoundError and its kin: what says something of the name that was asked for, and nothing of the store.
_OF_A_NAME = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP})
_REFUSED_BY_SYSTEM = frozenset(errno.errorcode[number] for number in _REFUSED_ERRNO)
#: Answers that say something of the object that was asked for: that it is not there, is there, or is another.
_OF_AN_OBJECT = frozenset({404, 409, 412, 416})
_NO_ENDPOINT = "the endpoint is no URL"


@dataclass(frozen=True)
class Fault:
    """What kind of failure it is, and its code or type: nothing that could quote a request."""

    kind: Kind
    what: str


def classify(error: BaseException) -> Fault:
    """What to do about an error of a store: what the server answered, else the innermost cause that says anything."""
    fault = _classify_link(error)
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict) and "Error" in response:  # botocore's ClientError; s3fs wraps it in an OSError
            code = str(response["Error"].get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return Fault(_kind_of_answer(code, status), f"{code} {status}" if code != str(status) else code)
        found = _classify_link(link)
        if found.kind != "other":
            fault = found
    return fault


def with_retries(operation: Callable[[], T], *, place: str, connect_anew: Callable[[], None] | None = None) -> T:
    """Run an operation, again and again while the store fails in ways that pass.

    Pauses double from 0.2 s to 15 s, with jitter, for up to PCM_STORE_RETRY_SECONDS (300) since the first failure;
    one line is logged at the first failure of a process and every 30 s. Where no credentials are found it is tried
    again for CREDENTIALS_SECONDS, after `connect_anew`: a metadata service may be late with them. Raises StoreFailure
    when that time is over (one that `passes`, but for credentials: they were waited for), when the disk or quota is
    full, when access is refused, when the bucket does not exist and at any other OSError of the store. An OSError that
    says something of the name, as FileNotFoundError does, and whatever else `operation` raises passes unchanged.
    """
    outage, no_credentials = _Patience(), _Patience(CREDENTIALS_SECONDS)
    patience = outage
    while True:
        try:
            if patience is no_credentials and connect_anew is not None:
                connect_anew()
            return operation()
        except Exception as error:
            fault = classify(error)
            if fault.kind == "other" and not _is_of_the_store(error):
                raise
            late = fault.kind == "no credentials" and _may_come_later(fault)
            if fault.kind != "transient" and not late:
                raise StoreFailure(_advice(fault, place)) from None
            patience = no_credentials if late else outage
            if (left := patience.left()) <= 0:
                said = _advice(fault, place) if late else _given_up(fault, place, patience.spent)
                raise StoreFailure(said, passes=not late) from None
            if _lines.due():
                log.warning("%s: %s; trying again for up to %s%s", place, fault.what, duration(left), _public(fault))
        patience.sleep(left)


def load_with_retries(load: Callable[[], T], *, model: str) -> T:
    """Load a model, again and again while its hub or store fails in ways that pass: as patient as `with_retries`.

    On many machines that start at once, one answer of a hub in a hundred is a failure. Whatever else `load` raises, and
    the last failure when the time is over, passes unchanged.
    """
    patience = _Patience()
    while True:
        try:
            with _no_garbage_collection():
                return load()
        except Exception as error:
            fault = classify(error)
            if fault.kind != "transient" or (left := patience.left()) <= 0:
                raise
            log.warning("%s: not loaded (%s); trying again for up to %s", model, fault.what, duration(left))
        patience.sleep(left)


def says_existing(error: Exception) -> bool:
    """Whether a put of an object that must be new was refused because there is one."""
    answers = ("412", "PreconditionFailed 412", "HTTP 412")
    return isinstance(error, FileExistsError) or classify(error).what in answers


def says_unknown(error: Exception) -> bool:
    """Whether the server does not know this kind of request."""
    return classify(error).what in ("501", "NotImplemented 501", "HTTP 501")


def retry_seconds() -> float:
    return seconds_of("PCM_STORE_RETRY_SECONDS", RETRY_SECONDS)


def seconds_of(variable: str, default: float) -> float:
    """What a variable of the environment says. Raises InputError for what is no number of seconds."""
    given = os.environ.get(variable) or default
    with suppress(ValueError):
        if not math.isnan(seconds := float(given)):
            return max(0.0, seconds)
    raise InputError(f"{variable} {given}: must be a number of seconds, such as {default:g}")


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Loading a model imports thousands of modules, and each collection looks through all that are there: 1 s of 9."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Patience:
    """Pauses that double, with jitter, for PCM_STORE_RETRY_SECONDS since the first failure, and `longest` at most."""

    def __init__(self, longest: float = math.inf) -> None:
        self._longest = longest
        self._failed_at: float | None = None
        self._pause = FIRST_PAUSE

    @property
    def spent(self) -> float:
        """Seconds since the first failure."""
        return 0.0 if self._failed_at is None else time.monotonic() - self._failed_at

    def left(self) -> float:
        """Seconds for which it may be tried again; the first call says that it failed."""
        if self._failed_at is None:
            self._failed_at = time.monotonic()
        return min(retry_seconds(), self._longest) - self.spent

    def sleep(self, left: float) -> None:
        time.sleep(min(self._pause * random.uniform(0.5, 1.0), left))
        self._pause = min(self._pause * 2, LONGEST_PAUSE)


def no_bucket(place: str) -> StoreFailure:
    return StoreFailure(
        f"{place}: no such bucket; create it, or correct the URI, the endpoint (of S3 AWS_ENDPOINT_URL) or the region"
    )


def _may_come_later(fault: Fault) -> bool:
    """Whether a client may find credentials later. The variable is botocore's: it says nothing of Azure's."""
    return fault.what != "NoCredentialsError" or os.environ.get("AWS_EC2_METADATA_DISABLED", "false").lower() != "true"


def _is_of_the_store(error: Exception) -> bool:
    absent = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)
    return isinstance(error, OSError) and not isinstance(error, absent) and error.errno not in _OF_A_NAME


def _given_up(fault: Fault, place: str, seconds: float) -> str:
    if fault.what in ("EMFILE", "ENFILE"):
        return f"{place}: too many open files for {duration(seconds)} ({fault.what}); raise `ulimit -n` and {RERUN}"
    return f"{place}: the store did not answer properly for {duration(seconds)} ({fault.what}); {RERUN} when it does"


def _advice(fault: Fault, place: str) -> str:
    if fault.kind == "full":
        return f"disk full at {place} ({fault.what}): free space and {RERUN}; nothing is half-written"
    if fault.kind == "no bucket":
        return str(no_bucket(place))
    if fault.kind == "other":
        return f"{place}: the store or disk failed ({fault.what}); mend it and {RERUN}"
    if fault.kind == "bad request":
        return f"{place}: the store does not take the request ({fault.what}); mend what it names and {RERUN}"
    if fault.what == _NO_ENDPOINT:
        return f"{place}: {_NO_ENDPOINT}; give AWS_ENDPOINT_URL as https://HOST or http://HOST:PORT"
    if fault.what.startswith("InvalidObjectState"):
        return f"{place}: is in an archive of the store ({fault.what}); restore it there, and {RERUN}"
    if fault.what in _REFUSED_BY_SYSTEM:
        return (
            f"{place}: access refused ({fault.what}); check its owner and permissions, and that its disk is not "
            "mounted read-only"
        )
    if fault.what.startswith("RequestTimeTooSkewed"):
        return f"{place}: the store says that this machine's clock is wrong ({fault.what}); set it, and {RERUN}"
    token = " (a token may have expired)" if fault.what == "400" else ""  # S3's answer to a HEAD has no reason
    return (
        f"{place}: access refused ({fault.what}); check the credentials in the environment, the profile or the role"
        f"{token}, and its rights to list, get and put{_public(fault)}"
    )


def _public(fault: Fault) -> str:
    return "; for a public bucket set FSSPEC_S3_ANON=true" if fault.what == "NoCredentialsError" else ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__


def _classify_link(error: BaseException) -> Fault:
    names = {base.__name__ for base in type(error).__mro__}
    name = type(error).__name__
    if name == "OfflineModeIsEnabled":  # of a hub; a ConnectionError that no patience helps
        return Fault("other", name)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):  # a hub's, by httpx or requests; Azure's
        code = str(getattr(error, "error_code", None) or "")  # azure.core's, of a store
        return Fault(_kind_of_answer(code, status), f"HTTP {status}")
    if "ClientResponseError" in names or "HttpError" in names:  # aiohttp; gcsfs
        answered = getattr(error, "status", None) or getattr(error, "code", None) or 0
        return Fault(_kind_of_answer("", int(answered)), f"HTTP {answered}")
    named = name
    if isinstance(error, OSError) and error.errno is not None and error.errno in errno.errorcode:
        code = errno.errorcode[error.errno]
        if error.errno in FULL_ERRNO:
            return Fault("full", code)
        if error.errno in _REFUSED_ERRNO:
            return Fault("refused", code)
        if error.errno in _TRANSIENT_ERRNO:
            return Fault("transient", code)
        named = code
    if names & _NO_CREDENTIALS_TYPES:
        return Fault("no credentials", name)
    if names & _REFUSED_TYPES:
        return Fault("refused", name)
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return Fault("refused", "the endpoint's certificate is not trusted")
    if isinstance(error, ValueError) and str(error).startswith("Invalid endpoint"):  # botocore's
        return Fault("refused", _NO_ENDPOINT)
    if names & _TRANSIENT_TYPES:
        return Fault("transient", name)
    return Fault("other", named)


def _kind_of_answer(code: str, status: int) -> Kind:
    if code in _FULL_CODES or status == 507:
        return "full"
    if code in ("NoSuchBucket", "ContainerNotFound"):
        return "no bucket"
    if code in _TRANSIENT_CODES or status in (408, 429) or (status >= 500 and status != 501):
        return "transient"
    if code in _REFUSED_CODES or status in (401, 402, 403) or (status == 400 and code in ("", "400")):
        return "refused"
    return "bad request" if 400 <= status < 500 and status not in _OF_AN_OBJECT else "other"


#: One line for a store that fails sixteen threads at once, and one every 30 seconds.
_lines = LineTimer(30.0, at_once=True)
