"""Programs that are no part of the package: no run imports them."""
