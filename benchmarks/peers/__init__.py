"""hsrpc beside FlexGen and transformers: same machine, same budgets, one run."""
