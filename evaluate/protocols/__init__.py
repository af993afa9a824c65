"""The paper's protocols: each a declarative plan in YAML, computed, resumed, checked, shown."""
