"""Cut a COCO data set into crops of its larger objects, with one class: many small images from few large ones.

    python docs/results/object_crops.py COCO_DIR CROPS_DIR

A crop is a square around an object whose shorter edge has at least 32 pixels. Its side is 1.3 to 2.5 times the
object's longer edge, at most the photo's shorter edge. It is moved at random; an object that fits stays inside.
Objects of which at least half lies inside, and which cover at least 4 % of the crop, are labeled. All others are marked
as crowds, which are ignored in training and evaluation.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image


def window(box: list[float], width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
    """A random crop (x1, y1, x2, y2) around an object of COCO's (x, y, width, height)."""
    x, y, w, h = box
    side = int(min(max(w, h) * draw.uniform(1.3, 2.5), width, height))
    left = int(min(max(x + w / 2 - side / 2 + draw.uniform(-0.5, 0.5) * max(side - w, 0), 0), width - side))
    top = int(min(max(y + h / 2 - side / 2 + draw.uniform(-0.5, 0.5) * max(side - h, 0), 0), height - side))
    return left, top, left + side, top + side


def inside(box: list[float], crop: tuple[int, int, int, int]) -> list[float] | None:
    """The part of a box in the crop, in the crop's pixels; None if it is outside."""
    x, y, w, h = box
    left, top, right, bottom = crop
    x1, y1, x2, y2 = max(x, left), max(y, top), min(x + w, right), min(y + h, bottom)
    return [x1 - left, y1 - top, x2 - x1, y2 - y1] if x2 - x1 > 1 and y2 - y1 > 1 else None


def main() -> None:
    """Write both splits of the data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    words = parser.parse_args()
    draw = random.Random(0)
    for split in ("train2017", "val2017"):
        truth = json.loads((words.source / f"annotations/instances_{split}.json").read_text())
        of_image = {image["id"]: [] for image in truth["images"]}
        for entry in truth["annotations"]:
            of_image[entry["image_id"]].append(entry)
        images, annotations = [], []
        (words.target / split).mkdir(parents=True)
        for image in truth["images"]:
            picture = Image.open(words.source / split / image["file_name"]).convert("RGB")
            for main_object in of_image[image["id"]]:
                if main_object["iscrowd"] or min(main_object["bbox"][2:]) < 32:
                    continue
                crop = window(main_object["bbox"], *picture.size, draw)
                name, number = f"{main_object['id']}.jpg", len(images) + 1
                picture.crop(crop).save(words.target / split / name, quality=95)
                images.append(
                    {"id": number, "file_name": name, "width": crop[2] - crop[0], "height": crop[3] - crop[1]}
                )
                for entry in of_image[image["id"]]:
                    if box := inside(entry["bbox"], crop):
                        area, (_, _, w, h) = box[2] * box[3], entry["bbox"]
                        small = area < 0.04 * (crop[2] - crop[0]) ** 2 or area < 0.5 * w * h
                        annotations.append(
                            {
                                "id": len(annotations) + 1,
                                "image_id": number,
                                "category_id": 1,
                                "bbox": box,
                                "area": area,
                                "iscrowd": int(small or entry["iscrowd"]),
                            }
                        )
        (words.target / "annotations").mkdir(exist_ok=True)
        path = words.target / f"annotations/instances_{split}.json"
        path.write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]})
        )
        counted = sum(not entry["iscrowd"] for entry in annotations)
        print(f"{path}: {len(images)} crops, {counted} objects")


if __name__ == "__main__":
    main()
