"""The report: one HTML page that needs nothing but itself, and a picture of it."""
