"""Published values that protocols are compared with."""
