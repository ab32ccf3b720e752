"""Groups of a run's configuration: each key a user can set, with its unit; `train/config.py` joins them."""
