"""Parts for those who test their own clients, servers, front ends and devices."""
