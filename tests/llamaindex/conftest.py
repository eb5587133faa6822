"""What the tests of the LlamaIndex adapter share: an environment in which its clients are made quickly."""

from __future__ import annotations

import os
from pathlib import Path

# Each HTTP client reads all the world's certificates when it is made, for some 20 ms. No test here speaks TLS.
os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent)
