"""Files of requests in OpenAI's batch form: read, ordered, run, written so that a kill loses nothing."""
