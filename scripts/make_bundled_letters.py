"""The scenes of the bundled data's grammar: what a text is, whom or what it is about, and the sentences it may use.

`{entity}` and `{subject}` are filled from the scene's own lists; `{other}` and `{friend}` are people and `{rival}` is a
second entity of the same list, all three distinct from the entity, so that the right one has to be read from its role.
The remaining slots name a list in `make_bundled_words.SLOTS`. A text takes one alternative from each part, in order.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scene:
    """One situation: `asks` continues "Write an email ", `parts` are the text's pieces with their alternatives."""

    kind: str
    name: str
    entity: str
    subject: str
    asks: tuple[str, ...]
    parts: tuple[tuple[str, ...], ...]


GREETING = ("Hi {entity},\n\n", "Hello {entity},\n\n", "Dear {entity},\n\n")
SIGN_OFF = (
    "\n\nThanks,\n{other}",
    "\n\nBest wishes,\n{other}",
    "\n\nKind regards,\n{other}",
    "\n\nAll the best,\n{other}",
)

EMAIL_EXTRA = (
    "",
    "",
    "I hope the family is well and that the new house feels like home by now.",
    "The lift is out of order again, so take the stairs when you next come by.",
    "How was the trip to the coast? I want to hear all about it when we next meet.",
    "My telephone is being repaired, so an answer in writing is the best way to reach me this week.",
)


def _email(name: str, subject: str, asks: tuple[str, ...], *body: tuple[str, ...]) -> Scene:
    return Scene("email", name, "person", subject, asks, (GREETING, *body, EMAIL_EXTRA, SIGN_OFF))


EMAILS = (
    _email(
        "move",
        "meeting",
        ("to {entity} asking to move the {subject} to {day}",),
        (
            "Could we move the {subject} to {day}?",
            "Would it be possible to hold the {subject} on {day} instead?",
            "I need to ask whether the {subject} can wait until {day}.",
        ),
        (
            "Something urgent has come up and {friend} and I will be out of the office before then.",
            "{friend} is away until then, and we should not decide anything without the whole team.",
            "The figures from {friend} will not be ready any sooner, so we would only be guessing.",
        ),
        (
            "Any time after {time} would suit me.",
            "I can book the small room for {time}.",
            "Let me know if {time} works.",
        ),
    ),
    _email(
        "send",
        "document",
        ("to {entity} asking for the {subject} by {day}",),
        (
            "Could you send me the {subject} by {day}?",
            "I am still missing the {subject}, and {day} is the last possible date.",
            "Please let me have the {subject} no later than {day}.",
        ),
        (
            "{friend} has to check everything before it goes to the printers.",
            "The bank has asked {friend} twice already, and I would like to close the file.",
            "Until then, {friend} cannot finish the work that we promised for {month}.",
        ),
        ("A scan is fine.", "A photo taken with your phone will do.", "Ring me if anything is unclear."),
    ),
    _email(
        "thank",
        "favour",
        ("to {entity} to say thank you for the {subject}",),
        (
            "I wanted to thank you for the {subject}.",
            "Thank you so much for the {subject}.",
            "This is just to say how grateful I am for the {subject}.",
        ),
        (
            "It came at exactly the right moment, and {friend} has talked of nothing else since.",
            "It made a hard week easier, and both {friend} and I will remember it.",
            "{friend} told me how much trouble you took, and it has not been forgotten.",
        ),
        ("The next coffee is on me.", "If I can ever return the favour, just ask.", "See you in {month}, I hope."),
    ),
    _email(
        "sorry",
        "meeting",
        ("to {entity} to apologise for missing the {subject}",),
        (
            "I am sorry that I missed the {subject} on {day}.",
            "Please accept my apologies for not being at the {subject} on {day}.",
            "I feel bad about missing the {subject} on {day}.",
        ),
        (
            "My train stopped for two hours and my phone had no signal, so I could not even warn {friend}.",
            "I had written down the wrong date, and {friend} only reached me when it was over.",
            "My daughter was ill, and I asked {friend} to tell you, but the message went astray.",
        ),
        (
            "Could you tell me what was decided?",
            "I will read everything you sent and catch up before {time} tomorrow.",
            "It will not happen again.",
        ),
    ),
)

NOTES = (
    Scene(
        "note",
        "chore",
        "person",
        "chore",
        ("for {entity} asking them to {subject}",),
        (
            ("Hey {entity}, could you {subject} before {time}?", "For {entity}: please {subject} when you get in."),
            (
                "I had to leave early to fetch {friend} from the station.",
                "I am at {friend}'s and will not be home until {hour}.",
                "{friend} and I both forgot this morning.",
            ),
            (
                "There is {dish} in the fridge, and you may have all of it. {other}",
                "Supper is {dish}, so don't be late. {other}",
                "I left some money on the shelf, and there is {dish} if you are hungry. {other}",
            ),
        ),
    ),
    Scene(
        "note",
        "thing",
        "person",
        "thing",
        ("telling {entity} where the {subject} is",),
        (
            (
                "Hey {entity}, the {subject} is in the {room}, on the top shelf.",
                "For {entity}: I put the {subject} in the {room}.",
            ),
            (
                "{friend} borrowed it on {day} and has only just brought it back.",
                "{friend} nearly threw it away, so I hid it behind the blue tin.",
                "Put it back when you are done, since {friend} needs it on {day}.",
            ),
            ("Back at {time}. {other}", "Gone to the shop, back by {time}. {other}", "See you tonight. {other}"),
        ),
    ),
    Scene(
        "note",
        "call",
        "person",
        "appointment",
        ("telling {entity} that the clinic rang about the {subject}",),
        (
            (
                "Hey {entity}, the clinic rang about your {subject}.",
                "For {entity}: someone from the clinic called. It was about the {subject}.",
            ),
            (
                "They can only offer {day} at {time} now, and they want an answer today.",
                "Ask for {friend} when you ring back, any time before {time}.",
                "They want to move it to {day}, and I said that {friend} could drive you.",
            ),
            (
                "The number is by the phone. {other}",
                "I wrote the number on the calendar. {other}",
                "Good luck! {other}",
            ),
        ),
    ),
)

REMINDERS = (
    Scene(
        "reminder",
        "doctor",
        "doctor",
        "appointment",
        ("about the {subject} with {entity} on {day} at {time}",),
        (
            (
                "Don't forget: {subject} with {entity} on {day} at {time}.",
                "Coming up on {day} at {time}: your {subject} with {entity}.",
                "Remember that the {subject} with {entity} is on {day} at {time}.",
            ),
            (
                "Bring your card and arrive ten minutes early.",
                "The practice has moved, and {rival} is no longer in the same building.",
                "If you cannot come, call the day before, or you will be charged.",
            ),
            (
                "Reply YES to confirm the time, or NO if you need another one.",
                "Ask {other} to sit with the children.",
                "Parking is on {street}, next to the office of {rival}.",
            ),
        ),
    ),
    Scene(
        "reminder",
        "club",
        "club",
        "rehearsal",
        ("to members of {entity} about the {subject} on {day}",),
        (
            (
                "Members of {entity}: don't forget that the {subject} is on {day}.",
                "Only a few days left until the {subject} of {entity} on {day}!",
                "Just so that nobody at {entity} forgets: {day} is the day of the {subject}.",
            ),
            (
                "Be there by {time}, as {rival} will need the room afterwards.",
                "Doors open at {time}, and our guests from {rival} are coming too.",
                "We share the bus with {rival}, and it leaves at {time} sharp.",
            ),
            (
                "If you have not paid yet, please see {other}.",
                "{other} still needs two pairs of hands for the tea.",
                "Please tell {other} today if you can't make it.",
            ),
            ("", "Cake is welcome, as ever.", "Wear something warm, since the heating is still out of order."),
        ),
    ),
    Scene(
        "reminder",
        "loan",
        "person",
        "loan",
        ("to return the {subject} to {entity} by {day}",),
        (
            (
                "Don't forget to take the {subject} back to {entity} by {day}.",
                "The {subject} has to be with {entity} again by {day}.",
                "By {day}: give the {subject} back to {entity}, as you promised.",
            ),
            (
                "It is in the {room}, behind the box that belongs to {other}.",
                "{other} can give you a lift if it is too heavy for the bus.",
                "You have had it since {month}, and {other} has already asked about it.",
            ),
            (
                "Check that nothing is missing first!",
                "Set an alarm for {time} so that it is not put off again.",
                "This is the last chance before the holidays, and the shop will not lend you another.",
            ),
        ),
    ),
)

INVITATIONS = (
    Scene(
        "invitation",
        "party",
        "person",
        "party",
        ("asking {entity} to come to a {subject} on {day}",),
        (
            (
                "Dear {entity},\n\nwe would love you to join us for a {subject} on {day} at {time}.",
                "My dear {entity}, you are warmly invited to our {subject}! It is on {day} at {time}.",
                "Dear {entity},\n\nplease be our guest at the {subject} that we are giving on {day} from {time}.",
            ),
            (
                "There will be {dish} and music, and {friend} has promised to sing.",
                "{friend} is making {dish}, and the garden will be full of lights.",
                "Bring nothing but good company. {friend} is coming too.",
            ),
            (
                "RSVP to {other} before {month}.",
                "Please tell {other} whether you can come.\n\nWith love from all of us",
                "We hope to see you there!\n\nYours, {other}",
            ),
        ),
    ),
    Scene(
        "invitation",
        "show",
        "person",
        "show",
        ("asking {entity} to attend a {subject} on {day}",),
        (
            (
                "Dear {entity},\n\nit would be an honour to have you as our guest at the {subject} on {day}.",
                "Dearest {entity}, you are cordially invited to the {subject} on {day}, starting at {time}.",
                "Dear {entity},\n\nwill you join us for the opening night of our {subject} on {day}?",
            ),
            (
                "The doors open at {hour}, and {friend} will say a few words.",
                "{friend} has worked on it since {month} and would be so glad to see you.",
                "Afterwards there will be wine and {dish} on {street}.",
            ),
            (
                "A seat in the first row is kept for you. Please answer to {other}.",
                "RSVP to {other} by {month}.",
                "We look forward to welcoming you.\n\n{other} and friends",
            ),
        ),
    ),
    Scene(
        "invitation",
        "honour",
        "person",
        "rehearsal",
        ("asking {entity} to be the guest of honour at the {subject}",),
        (
            (
                "Dear {entity},\n\nthe committee would be delighted to have you as guest of honour at our {subject}.",
                "Dearest {entity}, will you do us the pleasure of being the guest of honour at the {subject}?",
                "Dear {entity},\n\nnobody deserves it more: please be the guest of honour at this year's {subject}.",
            ),
            (
                "It begins at {time} on {day}, and {friend} will meet you at the gate.",
                "We start on {day} at {time} with {dish}, and {friend} has written a song for the evening.",
                "Last year we had {friend}, and people still talk about it.",
            ),
            (
                "A room for the night is of course arranged.\n\nYours sincerely,\n{other}",
                "There is no need to prepare a speech. Kindly let {other} know by {month}.",
                "We hope with all our hearts that you will say yes.\n\n{other}, for the committee",
            ),
        ),
    ),
)
