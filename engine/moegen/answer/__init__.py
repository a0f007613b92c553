"""What an answer may be, and what it is worth as columns: grammars over tokens, JSON Schema as Arrow types."""
