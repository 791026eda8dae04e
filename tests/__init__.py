"""Tests mirror the package: tests/ops/test_x.py tests drl_fast/ops/x.py."""

import warnings

# pytest turns the warning about a missing extension into an error, but the suite must run without the extension.
# tests/test_fallback.py tests the warning itself.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    import drl_fast  # noqa: F401
