"""Where tasks come from, one file a source."""
