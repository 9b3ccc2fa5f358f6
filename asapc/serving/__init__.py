"""Packages what `asapc compile` wrote for servers, and tries them."""
