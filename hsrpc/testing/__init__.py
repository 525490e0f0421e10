"""Parts for those who test their own clients, front ends and devices."""
