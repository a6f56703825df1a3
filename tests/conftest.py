"""Its place puts tests/ on the import path: the kits that several test files share lie here."""
