"""What lies where and how long a step takes: sizes, rates, memory, the search for the best plan."""
