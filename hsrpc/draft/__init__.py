"""Tokens that requests may go on with, proposed before the model is asked: drafters."""
