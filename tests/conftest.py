"""Property tests draw the same examples in every run, so that a red CI is red again; `--hypothesis-profile=search` looks further, with other ones."""
from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.register_profile("search", derandomize=False, max_examples=1000, print_blob=True)
settings.load_profile("same")
