"""Real certificates for tests: an authority, and what it issues, as PEM files that a [tls] table names."""

from __future__ import annotations

from pathlib import Path

import trustme

from kcm.rpc import TlsConfig


def issue(authority: trustme.CA, folder: Path, *names: str) -> TlsConfig:
    """A certificate for `names` (its SANs) with its key and the authority, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    issued = authority.issue_cert(*names)
    files = {name: folder / f"{name}.pem" for name in ("certificate", "key", "ca")}
    files["certificate"].write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(files["key"])
    authority.cert_pem.write_to_path(files["ca"])
    return TlsConfig(**{name: str(path) for name, path in files.items()})


def table(name: str, tls: TlsConfig) -> str:
    """The TOML table, e.g. of "edge.cloud.tls"."""
    return f"[{name}]\ncertificate = '{tls.certificate}'\nkey = '{tls.key}'\nca = '{tls.ca}'\n"
