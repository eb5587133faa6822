"""LiteLLM asks the network for prices when it is imported, unless it is told not to."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
