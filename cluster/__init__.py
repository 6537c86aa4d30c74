"""The method on Ray and object storage."""

import os

# A Ray of one machine listens on 127.0.0.1 alone where this is 0, and Ray looks when it is imported. (On macOS and
# Windows it is what Ray does anyway.) A job that joins a cluster has RAY_ADDRESS.
if not os.environ.get("RAY_ADDRESS"):
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
