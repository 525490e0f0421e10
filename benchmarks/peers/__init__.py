"""hsrpc beside FlexGen and transformers with accelerate: same machine, same budgets, one run."""
