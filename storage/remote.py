"""A root in an object store: `s3://bucket/prefix`, `gs://bucket/prefix`, or `http(s)://host/prefix` (read only).

All requests go through obstore (Apache object_store): ranges of one object are merged where they nearly touch and
fetched at once, failures are retried with growing pauses for up to three minutes. A put, single or in parts, shows the
whole object or nothing, so there is nothing to stage and nothing to sweep (a bucket's own rule should expire abandoned
multipart uploads).

Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, …) or, for
S3 when boto3 is installed, from its usual files; never from an argument. An http server cannot list: name the groups.

Limit: the connection does not survive a fork, and says so; start worker processes by spawn or forkserver.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from io import BufferedIOBase, BytesIO
from typing import Any

import numpy as np

from storage.base.boundary import MAX_JSON_BYTES
from storage.base.errors import StoreError, UserError
from storage.base.extras import how_to_install

try:
    import obstore
    from obstore import exceptions
    from obstore.store import HTTPStore, from_url
except ImportError:
    raise UserError(f"a store at a URL needs obstore; {how_to_install('remote')}") from None

RETRIES: Any = {"max_retries": 8, "retry_timeout": timedelta(seconds=180)}


class ObjectRoot:
    """A prefix of an object store; pickles as its URL."""

    concurrency = 32
    path = None

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._listable = not self.url.startswith(("http://", "https://"))
        self._pid = -1
        self._store: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ObjectRoot.__init__(self, state["url"])

    def __str__(self) -> str:
        return self.url

    @property
    def store(self) -> Any:
        """The obstore store, made at the first use."""
        if self._store is None:
            self._store, self._pid = _connect(self.url), os.getpid()
        if self._pid != os.getpid():
            raise StoreError(
                f"{self.url} was opened before this process was forked, and its connection does not survive a fork; "
                "start the workers by spawn (DataLoader: multiprocessing_context='spawn')"
            )
        return self._store

    def at(self, key: str) -> str:
        """The object's URL."""
        return f"{self.url}/{key}"

    def read(self, key: str) -> bytes:
        """The whole object."""
        with self._errors(key):
            answer = obstore.get(self.store, key)
            if answer.meta["size"] > MAX_JSON_BYTES:
                raise StoreError(f"{self.at(key)} has {answer.meta['size']:,} bytes, too many for what it should be")
            return bytes(answer.bytes())

    def open(self, key: str) -> BufferedIOBase:
        """The whole object, in memory."""
        with self._errors(key):
            return BytesIO(bytes(obstore.get(self.store, key).bytes()))

    def size(self, key: str) -> int:
        """Bytes of the object."""
        with self._errors(key):
            return int(obstore.head(self.store, key)["size"])

    def tail(self, key: str, n_bytes: int) -> tuple[int, bytes]:
        """The object's size and end."""
        size = self.size(key)
        return size, bytes(self.ranges(key, [max(0, size - n_bytes)], [size])[0]) if size else b""

    def sizes(self, prefix: str) -> Mapping[str, int] | None:
        """One listing, a thousand objects a request; None where the server cannot list."""
        if not self._listable:
            return None
        with self._errors(prefix):
            return {
                str(entry["path"]): int(entry["size"]) for batch in obstore.list(self.store, prefix) for entry in batch
            }

    def children(self, prefix: str) -> list[str]:
        """Names directly below the prefix."""
        if not self._listable:
            raise StoreError(f"{self.at(prefix)} cannot be listed over http; name the groups, such as latents/NAME")
        with self._errors(prefix):
            listing = obstore.list_with_delimiter(self.store, prefix or None)
        names = [str(path) for path in listing["common_prefixes"]] + [
            str(entry["path"]) for entry in listing["objects"]
        ]
        return sorted({name.rstrip("/").rsplit("/", 1)[-1] for name in names})

    def ranges(self, key: str, starts: Sequence[int], ends: Sequence[int]) -> list[memoryview]:
        """The bytes [start, end) of each range; may be short at the object's end. Raises FileNotFoundError."""
        with self._errors(key):
            return [memoryview(part) for part in obstore.get_ranges(self.store, key, starts=starts, ends=ends)]

    def write(
        self,
        key: str,
        buffers: Iterable[bytes | np.ndarray],
        run_id: str,
        *,
        staging: str = "",
        exclusive: bool = False,
        fsync: bool = True,
    ) -> int:
        """Put the object; it is durable when this returns, so `staging` and `fsync` mean nothing here."""
        if not self._listable:
            raise StoreError(f"{self.url} is read-only; write to a directory, s3:// or gs://")
        parts = [b.data.cast("B") if isinstance(b, np.ndarray) else memoryview(b) for b in buffers]
        nbytes = sum(part.nbytes for part in parts)
        body: Any = iter(parts) if nbytes > (8 << 20) else b"".join(parts)
        with self._errors(key):
            obstore.put(self.store, key, body, mode="create" if exclusive else "overwrite")
        return nbytes

    def zarr_store(self) -> Any:
        """zarr-python's store over the same connection."""
        import zarr.storage

        return zarr.storage.ObjectStore(self.store, read_only=True)

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Obstore's errors as the ones every root raises."""
        try:
            yield
        except (FileNotFoundError, exceptions.NotFoundError):
            raise FileNotFoundError(self.at(key)) from None
        except exceptions.AlreadyExistsError:
            raise FileExistsError(self.at(key)) from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise StoreError(
                f"{self.at(key)}: access denied ({_first_line(error)}); set the credentials in the environment, "
                "such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or in their usual file"
            ) from error
        except exceptions.BaseError as error:
            raise StoreError(
                f"{self.at(key)}: {_first_line(error)}; check the URL, the endpoint and the network"
            ) from error


def connection_options(url: str) -> dict[str, Any]:
    """How obstore is to connect to a URL: retries, timeouts, credentials. Raises StoreError when there are none."""
    options: dict[str, Any] = {"retry_config": RETRIES}
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""
    plain_http = url.startswith("http://") or (url.startswith("s3") and endpoint.startswith("http://"))
    # The default of 30 s is for a whole answer; 16 MB over a slow link may take longer.
    options["client_options"] = {
        "timeout": "300s",
        "connect_timeout": "10s",
        **({"allow_http": True} if plain_http else {}),
    }
    anonymous = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true")
    if url.startswith("s3") and not anonymous and "AWS_ACCESS_KEY_ID" not in os.environ and find_spec("boto3"):
        from obstore.auth.boto3 import Boto3CredentialProvider

        try:
            options["credential_provider"] = Boto3CredentialProvider()
        except ValueError:
            raise StoreError(
                f"{url}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, fill ~/.aws/credentials, or "
                "set AWS_SKIP_SIGNATURE=true for a public bucket"
            ) from None
    return options


def _connect(url: str) -> Any:
    make: Callable[..., Any] = HTTPStore.from_url if url.startswith(("http://", "https://")) else from_url
    options = connection_options(url)
    try:
        return make(url, **options)
    except (exceptions.BaseError, ValueError) as error:
        raise StoreError(f"{url} cannot be opened: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
