def import_config() -> None:
    """x"""
