"""The commands of ``dalle-fast``, each a function. What needs torch is imported inside it, so that help is quick."""
