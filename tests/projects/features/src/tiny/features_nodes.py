"""A node or two for each feature of Kedro."""


class Box:
    pass


boxes = []


def to_list(numbers):
    return [str(number) for number in numbers]


def to_text(text):
    return len([character for character in text if character in "123"])


def split(numbers):
    return {f"part{number}": number for number in numbers}


def gather(parts):
    return sum(load() for load in parts.values())


def read_news(incoming):
    return sorted(incoming)


def yield_chunks(numbers):
    yield from numbers


def count_chunks(chunks):
    return len(chunks)


def thread_names(one, other):
    return [one, other]


def from_report(report):
    return report["total"] + 1


def offset(numbers, offset):
    return [number + offset for number in numbers]


def nest(model, leaves):
    return [model, leaves]


def make_boxes():
    boxes[:] = [Box(), Box()]
    return tuple(boxes)


def compare_boxes(assigned, copied):
    return [assigned is boxes[0], copied is boxes[1]]


def hooked(added, numbers):
    return [added, numbers]
