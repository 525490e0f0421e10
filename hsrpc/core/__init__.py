"""Requests, blocks, plan and scheduler: decisions in pure Python, without torch and without asyncio."""
