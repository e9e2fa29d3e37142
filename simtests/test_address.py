"""What counts as the address of a PCI device."""

import errno

import pytest

from vfio import address, errors


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("0001:01:00.0", "0001:01:00.0"),
        ("1:1:0.0", "0001:01:00.0"),
        ("01:00.1", "0000:01:00.1"),
        ("0030:0A:1f.7", "0030:0a:1f.7"),
        ("10000:00:00.0", "10000:00:00.0"),
    ],
)
def test_forms_that_people_write_become_the_spelling_of_sysfs(text, spelled):
    assert address.parse(text) == spelled
    assert address.is_address(spelled)


@pytest.mark.parametrize(
    "text",
    ["", "..", "../../etc", "0000:01:00", "0000:01:00.8", "0000:01:20.0", "0000:01:00.0/../x", "0000:01:00.0\n", "g:1:0.0",
     " 0000:01:00.0", "0000:01:00.0 ", "\u0660:1:0.0", "eth0"],
)  # fmt: skip
def test_anything_else_is_refused_with_einval(text):
    with pytest.raises(errors.InvalidAddress) as caught:
        address.parse(text)
    assert caught.value.errno == errno.EINVAL
    assert not address.is_address(text)


def test_short_form_is_no_spelling_of_sysfs():
    assert not address.is_address("1:1:0.0")
