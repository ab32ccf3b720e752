"""What ranks find in their environment."""

from launch.environment import DEFAULTS, with_defaults


def test_what_the_user_set_stays() -> None:
    assert with_defaults({}) == DEFAULTS
    assert with_defaults({"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"


def test_an_allocator_set_under_its_newer_name_is_not_hidden() -> None:
    """torch prefers the older name, so a default under it would win over what the user wrote."""
    given = with_defaults({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"})
    assert given["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
    both = with_defaults({"PYTORCH_ALLOC_CONF": "a:1", "PYTORCH_CUDA_ALLOC_CONF": "b:2"})
    assert both["PYTORCH_CUDA_ALLOC_CONF"] == "b:2"
