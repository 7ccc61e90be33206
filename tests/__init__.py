"""The test suite. ``tests/support`` holds the code that several tests share."""
