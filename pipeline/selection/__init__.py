"""Selections: named views on the candidates, stratified by tissue source site."""
