"""Pools as earlier versions wrote them."""
