"""Policies of other papers, emulated on hsrpc's own data path."""
