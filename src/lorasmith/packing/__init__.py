"""TokenizedExamples -> Packs: shared prefixes stand once, nothing is split, nothing leaks."""
