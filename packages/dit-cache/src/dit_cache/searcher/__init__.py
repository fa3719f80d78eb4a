"""Finds the best schedule for a budget: `search`, `search_front`, and `search_block_cache` for a `CacheConfig`."""
