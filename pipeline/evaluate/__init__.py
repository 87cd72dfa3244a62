"""What a trunk has learned, measured on images that it has not seen, beside opponents that have learned nothing.

bank, held_out = read_tiles(train), read_tiles(test)            # tiles
views = render_views(bank, held_out, config.augment)            # views: clean, distorted, grey
evaluation = evaluate(trained, untrained, bank, held_out, views)  # suite
evaluation.to_json()                                            # table
"""
