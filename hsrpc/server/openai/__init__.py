"""The front end for OpenAI's and Anthropic's HTTP APIs: smg, a gateway, in a process of its own."""
