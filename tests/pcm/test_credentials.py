"""No credential in what a user names: one rule, and an error that does not show the secret."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from pcm.credentials import refuse_credentials, refuse_credentials_in
from pcm.errors import InputError

SECRET = "very-secret"


@pytest.mark.parametrize(
    "uri",
    [
        # before the "@"
        f"s3://AKIAKEY:{SECRET}@bucket/data",
        f"s3://{SECRET}@bucket/data",
        f"S3://AKIAKEY:{SECRET}@bucket/data",
        f"gs://user:{SECRET}@bucket/data",
        f"https://user:{SECRET}@host/captions.txt",
        f"https://{SECRET}@host/captions.txt",
        f"https://user:{SECRET}@host:8080/captions.txt",
        f"https://user%3A{SECRET}%40host/captions.txt",
        f"https://user%253A{SECRET}%2540host/captions.txt",
        f"http://user:@{SECRET}@host/captions.txt",
        f"sftp://user:{SECRET}@host/data",
        f"ftp://user:{SECRET}@host/data",
        f"abfs://container:{SECRET}@account.dfs.core.windows.net/data",
        f"hdfs://user:{SECRET}@namenode:9000/data",
        f"smb://user:{SECRET}@server/share",
        f"github://org:{SECRET}@main/captions.txt",
        f"s3://AKIAKEY:{SECRET}/with/slash@bucket/data",
        f"https://user:{SECRET}?@host/captions.txt",
        f"s3://AKIAKEY:{SECRET}::with-colons@bucket/data",
        # chains
        f"simplecache::https://user:{SECRET}@host/captions.txt",
        f"simplecache::https://{SECRET}@host/captions.txt",
        f"filecache::s3://AKIAKEY:{SECRET}@bucket/captions.txt",
        f"zip://captions.txt::https://user:{SECRET}@host/all.zip",
        f"zip://captions.txt::simplecache::https://host/all.zip?token={SECRET}",
        f"zip://captions.txt::s3://AKIAKEY:{SECRET}@bucket/all.zip",
        # parameters
        f"https://host/captions.txt?X-Amz-Signature={SECRET}",
        f"https://host/captions.txt?X-Amz-Credential={SECRET}&X-Amz-Date=20260101",
        f"https://host/captions.txt?x-amz-security-token={SECRET}",
        f"https://host/captions.txt?X-Goog-Signature={SECRET}",
        f"https://host/captions.txt?AWSAccessKeyId={SECRET}&Expires=1",
        f"https://host/captions.txt?Key-Pair-Id={SECRET}",
        f"https://host/captions.txt?Policy={SECRET}",
        f"https://host/captions.txt?a=b&sig={SECRET}",
        f"https://host/captions.txt?sv=2024&sig={SECRET}&se=1",
        f"abfs://container@account.dfs.core.windows.net/data?sig={SECRET}",
        f"https://host/captions.txt?token={SECRET}",
        f"https://host/captions.txt?access_token={SECRET}",
        f"https://host/captions.txt?private-token={SECRET}",
        f"https://host/captions.txt?api_key={SECRET}",
        f"https://host/captions.txt?apikey={SECRET}",
        f"https://host/captions.txt?API-Key={SECRET}",
        f"https://host/captions.txt?key={SECRET}",
        f"https://host/captions.txt?auth={SECRET}",
        f"https://host/captions.txt?authorization={SECRET}",
        f"https://host/captions.txt?password={SECRET}",
        f"https://host/captions.txt?pwd={SECRET}",
        f"https://host/captions.txt?client_secret={SECRET}",
        f"https://host/captions.txt?jwt={SECRET}",
        f"https://host/captions.txt?session={SECRET}",
        f"https://host/captions.txt?code={SECRET}",
        f"https://host/captions.txt?a=b;token={SECRET}",
        f"https://host/captions.txt;token={SECRET}",
        f"https://host/captions.txt#access_token={SECRET}",
        f"https://host/captions.txt?%74oken={SECRET}",
        f"https://host/captions.txt?{SECRET}-and-more",
        f"https://host/get?url=https%3A%2F%2Fuser%3A{SECRET}%40inner%2Fcaptions.txt",
        f"s3://bucket/key?versionId=7&token={SECRET}",
        # no protocol, or half of one
        f"user:{SECRET}@host/captions.txt",
        f"user:{SECRET}@host:captions.txt",
        f"//user:{SECRET}@host/captions.txt",
        f"s3:/AKIAKEY:{SECRET}@bucket/data",
        f"s3:AKIAKEY:{SECRET}@bucket/data",
    ],
)
def test_a_credential_is_refused_in_one_line_that_does_not_show_it(uri: str) -> None:
    with pytest.raises(InputError, match="carries a credential") as caught:
        refuse_credentials(uri)
    assert SECRET not in str(caught.value) and "AKIAKEY" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (f"https://user:{SECRET}@host/x", "https://...: "),
        (f"simplecache::s3://k:{SECRET}@b/x", "s3://...: "),
        (f"user:{SECRET}@host/x", "...@...: "),
        (f"not one\n://user:{SECRET}@host", "...@...: "),
    ],
)
def test_the_error_shows_the_protocol(uri: str, shown: str) -> None:
    with pytest.raises(InputError) as caught:
        refuse_credentials(uri)
    assert str(caught.value).startswith(shown) and SECRET not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "captions.txt", "/data/captions.txt", "data/run 7/cap?tions=1.txt", "a::b.txt", "data@v2/captions.txt",
        "runs/2026-01-01T12:30/x", "C:/data/captions.txt", "embedded:val", "ViT-L-14/openai", "hf-hub:org/model",
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "org/model@main", "", ".",
        "s3://bucket/data", "s3://bucket/a@b/captions.txt", "s3://bucket/12:30@home/x", "s3://bucket/key?versionId=3HL4kqtJvjVBH40Nrjfkd",
        "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/name/key", "gs://bucket/data", "file:///data/captions.txt",
        "https://host/captions.txt", "https://host:8080/captions.txt", "https://host/get?file=captions.txt&dl=1",
        "https://host/get?id=1AbCdEfGhIjKlMnOpQrStUvWxYz&export=download", "https://host/x?download",
        "abfs://container@account.dfs.core.windows.net/data", "sftp://user@host/data", "hdfs://user@namenode:9000/data",
        "simplecache::https://host/captions.txt", "zip://captions.txt::s3://bucket/all.zip",
        "hf://datasets/org/name@main/captions.txt", "memory://captions.txt",
    ],
)  # fmt: skip
def test_what_carries_none_passes(uri: str) -> None:
    refuse_credentials(uri)


@dataclass(frozen=True)
class Request:
    """As jobs have them."""

    out: str = "s3://bucket/run"
    data: str | Path | list[str] | tuple[str | Path, ...] | None = None
    number: int = 3


@pytest.mark.parametrize(
    "data",
    [
        BAD := f"s3://key:{SECRET}@bucket/x",
        ["data", BAD],
        ("data", f"{BAD}=0.5"),
        PATH := Path(f"key:{SECRET}@host/x"),
        ("data", PATH),
    ],
)
def test_a_request_is_searched_whole(data: str | Path | list[str] | tuple[str | Path, ...]) -> None:
    refuse_credentials_in(Request())
    refuse_credentials_in(Request(data=["a", "b"]))
    with pytest.raises(InputError, match="carries a credential") as caught:
        refuse_credentials_in(Request(data=data))
    assert SECRET not in str(caught.value)
