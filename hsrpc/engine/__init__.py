"""Where asyncio meets torch: the weight prefetcher, the cache manager, the executor and the engine over them."""
