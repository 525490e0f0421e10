"""One suite for the clients of all languages: cases as data, servers to run them against, and a table of results."""
