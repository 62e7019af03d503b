"""One file per report: each reads stored records and returns text or a figure."""
