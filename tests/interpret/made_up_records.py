"""Records of features as the stage ``interpret`` writes them, without a model."""

BAD = "</script><script>alert(1)</script>"


def made_up_record(feature: int, fires: int = 12) -> dict:
    """A record as the stage writes it."""
    one = dict(tokens=["The", " city\n", BAD, " of", "\ud800", " Rome"], acts=[0.0, None, 1.5, 0, 2.5, 0.2], peak=4)
    one |= dict(document=3, position=9)
    row = dict(text=BAD, hits=5, occurrences=9, sum=7.5, mean=0.833)
    near = [[(feature + 1) % 70, 0.61], [2, 0.2]]
    found = dict(feature=feature, fires=fires, rate=fires / 1000, nearest=near, up=[[BAD, 3.1]], down=[[" no", -2.0]])
    found |= dict(logits=dict(low=-2.0, high=3.1, counts=[1] * 50))
    if not fires:
        return found | dict(shuffled_f1=0.0)
    share = dict(mean=0.8, low=0.7, high=0.9)
    detector = dict(family="token", says="“ Paris”", search_f1=0.9, f1=share)
    return found | dict(
        mean=1.0, max=2.5, tenths=[0.1 * n for n in range(10)] + [2.5],
        histogram=[0, 3, 9] + [0] * 37, examples=[one, one], groups=[one | dict(group=0), one | dict(group=9)],
        tokens=[row], detector=detector, shuffled_f1=0.1,
    )  # fmt: skip
