"""Scenes of texts written for the public: notices, posts, reviews and announcements."""

from __future__ import annotations

from make_bundled_letters import Scene

NOTICES = (
    Scene(
        "notice",
        "closed",
        "venue",
        "work",
        ("saying that {entity} will be closed on {day} for {subject}",),
        (
            (
                "Please be aware that {entity} will be closed to the public on {day} because of {subject}.",
                "CLOSED on {day}. There will be no access to {entity} on account of {subject}.",
                "Because of {subject}, nobody will be admitted to {entity} on {day}.",
            ),
            (
                "Visitors are asked to use {rival} instead.",
                "During this time {rival} stays open as usual.",
                "Tickets that were bought in advance are valid at {rival}.",
            ),
            (
                "Questions may be put to the caretaker, {other}, before {time}.",
                "We regret the inconvenience and ask for your patience. The management",
                "Normal hours resume the next morning at {time}.",
            ),
        ),
    ),
    Scene(
        "notice",
        "found",
        "venue",
        "lost",
        ("about {subject} found at {entity}",),
        (
            (
                "FOUND: {subject}, handed in at {entity} on {day}.",
                "On {day} somebody left {subject} at {entity}.",
                "The staff of {entity} are keeping {subject} that was picked up on {day}.",
            ),
            (
                "The owner may collect it from the front desk on weekdays until {time}.",
                "To claim it, please describe it to {other} at the desk before {time}.",
                "Bring some proof that it is yours, and ask for {other}.",
            ),
            (
                "Unclaimed items go to {rival} at the end of {month}.",
                "After four weeks it will be given to the charity stall at {rival}.",
                "Anything not claimed by {month} is sold at {rival}.",
            ),
        ),
    ),
    Scene(
        "notice",
        "rule",
        "venue",
        "rule",
        ("to visitors of {entity} about the rule: {subject}",),
        (
            (
                "All users of {entity} must keep to the following rule from {day}: {subject}.",
                "From {day} a new rule applies at {entity}: {subject}.",
                "Please respect the rule of the house at {entity}: {subject}.",
            ),
            (
                "The same rule has been in force at {rival} since {month} without difficulty.",
                "It was agreed by the residents in {month}, after complaints from {rival}.",
                "Those who do not wish to follow it are welcome at {rival}.",
            ),
            (
                "By order of the committee.",
                "Signed, {other}, warden.",
                "Anyone who breaks it may be asked to leave. Thank you for your cooperation. The management",
            ),
        ),
    ),
)

POSTS = (
    Scene(
        "post",
        "visit",
        "spot",
        "activity",
        ("about a visit to {entity} for {subject}",),
        (
            (
                "Finally made it to {entity} this weekend, and it was perfect for {subject}!",
                "What a day! We drove out to {entity} for {subject}.",
                "Back home from {entity}, where {other} and I went for {subject}.",
            ),
            (
                "The weather was {weather}, and we had the place almost to ourselves.",
                "It was {weather}, my feet hurt, and I would do it all again tomorrow.",
                "I had always preferred {rival}, but this has changed my mind.",
            ),
            (
                "Next stop: {rival}. Who's in? #weekend",
                "More pictures tomorrow, {friend} took hundreds of them. #outdoors",
                "If you go, take {dish} and get there before {time}. #daytrip",
            ),
            (
                "",
                "I needed this after the month I've had, and I slept like a stone.",
                "Thank you to the kind stranger who showed us the way when it got dark!",
            ),
        ),
    ),
    Scene(
        "post",
        "tip",
        "spot",
        "activity",
        ("asking for tips on {subject} at {entity}",),
        (
            (
                "Has anyone here tried {subject} at {entity}?",
                "Friends, I need your tips: {subject} at {entity}, yes or no?",
                "Thinking of {subject} at {entity} next {day}. Good idea or not?",
            ),
            (
                "We did {rival} in {month} and loved it, but I hear this is quite different.",
                "{other} says that {rival} is nicer, and I don't believe a word of it.",
                "It will be {count} of us, with {other} and the kids.",
            ),
            (
                "Tell me everything in the comments! #askingforafriend",
                "Best answer gets a slice of my {dish}. #help",
                "Comments are open, be kind! #travel",
            ),
        ),
    ),
    Scene(
        "post",
        "lost",
        "spot",
        "lost",
        ("asking for help to find {subject} lost at {entity}",),
        (
            (
                "Help needed! We lost {subject} at {entity} on {day}.",
                "Long shot, but has anybody found {subject} at {entity}?",
                "Please share! Somewhere at {entity} there must be {subject}, lost on {day}.",
            ),
            (
                "It belongs to {other}, who has been in tears ever since.",
                "We walked on to {rival} afterwards, but I am sure that we still had it when we left.",
                "{other} has already asked at the office, without any luck so far.",
            ),
            (
                "The finder gets {dish}, home-made, I promise! #lostandfound",
                "Write me a message, day or night. #lost #pleaseshare",
                "We are back there on {day} from {time} to look again. Join us? #lost",
            ),
        ),
    ),
)

REVIEWS = (
    Scene(
        "review",
        "mixed",
        "product",
        "praise",
        ("of the {entity} praising the {subject} but criticising the {fault}",),
        (
            (
                "I bought the {entity} in {month} and have used it nearly every day.",
                "After {count} weeks with the {entity} I know it rather well.",
                "We chose the {entity} because the {rival} was sold out.",
            ),
            (
                "The best thing about it is the {subject}.",
                "What I like most is the {subject}, which beats my old {rival} easily.",
                "It wins me over with its {subject}.",
            ),
            (
                "On the other hand, the {fault} is a nuisance.",
                "Sadly, there is also the {fault}, which nobody mentions in the shop.",
                "I could do without the {fault}.",
            ),
            (
                "Four stars out of five.",
                "Three stars, and a fourth if the makers ever put that right.",
                "Still worth the money, all in all.",
            ),
        ),
    ),
    Scene(
        "review",
        "bad",
        "product",
        "fault",
        ("warning others about the {subject} of the {entity}",),
        (
            (
                "Very disappointed with the {entity}.",
                "Save your money and do not order the {entity}.",
                "The {entity} looks nice in the pictures, and that is all it does.",
            ),
            (
                "Mine arrived {count} days late, and the {subject} was obvious at once.",
                "The {subject} makes it almost impossible to use.",
                "Because of the {subject} it has been in a cupboard since {month}.",
            ),
            (
                "I have gone back to my {rival}.",
                "For less money I got the {rival}, which simply works.",
                "{other} warned me to get the {rival}, and I should have listened.",
            ),
            (
                "One star, and only because zero is not allowed.",
                "Two stars.",
                "Returned it and got a refund. One star.",
            ),
        ),
    ),
    Scene(
        "review",
        "good",
        "product",
        "praise",
        ("recommending the {entity} for its {subject}",),
        (
            (
                "I cannot recommend the {entity} highly enough.",
                "The {entity} is the best thing I have bought this year.",
                "Five stars for the {entity}!",
            ),
            (
                "Its {subject} is a joy, and after {count} months it works like on the first day.",
                "With its {subject} it leaves the {rival} far behind.",
                "The {subject} convinced even {other}, who never likes anything.",
            ),
            (
                "We have already ordered a second one for {friend}.",
                "If it ever breaks I will buy the same again.",
                "Before this I owned a {rival} and was never happy with it.",
            ),
        ),
    ),
)

ANNOUNCEMENTS = (
    Scene(
        "announcement",
        "service",
        "shop",
        "service",
        ("that {entity} will offer {subject} from {month}",),
        (
            (
                "We are excited to share some news: from {month}, {entity} will offer {subject}!",
                "Good news for our customers! {entity} is introducing {subject} in {month}.",
                "Big news! Starting in {month}, you can enjoy {subject} at {entity}.",
            ),
            (
                "Many of you have asked for this since {rival} closed its doors.",
                "Together with our partners at {rival}, we have worked on it for {count} months.",
                "{other} and the whole team have prepared everything with great care.",
            ),
            (
                "Find all the details at our shop on {street}.",
                "Come and see us on {street} from {time}.",
                "The first {count} customers on the day get a little present.",
            ),
        ),
    ),
    Scene(
        "announcement",
        "role",
        "shop",
        "role",
        ("that {other} will join {entity} as {subject}",),
        (
            (
                "We are pleased to share that {other} will join {entity} as {subject} in {month}.",
                "All of us at {entity} are proud to welcome {other} as our new {subject}.",
                "From {month}, {other} will be the new {subject} at {entity}.",
            ),
            (
                "{other} spent {count} years at {rival} and knows the trade inside out.",
                "Many of you will know {other} from {rival} on {street}.",
                "{other} takes over from {friend}, who is moving to {rival}.",
            ),
            (
                "Please join us in giving a warm welcome!",
                "The whole team is looking forward to it.",
                "We thank {friend} for everything and wish them well.",
            ),
        ),
    ),
    Scene(
        "announcement",
        "award",
        "shop",
        "award",
        ("that {entity} has won the {subject}",),
        (
            (
                "We are proud and happy to tell you that {entity} has won the {subject}!",
                "We did it! This year's {subject} goes to {entity}.",
                "The jury has spoken: the {subject} has been awarded to {entity}.",
            ),
            (
                "The jury chose us from {count} finalists, among them our friends at {rival}.",
                "Second place went to {rival}, and we congratulate them warmly.",
                "{other}, who founded the business on {street}, accepted the prize on {day}.",
            ),
            (
                "To all our customers: this is yours as well. Thank you!",
                "We are celebrating with free drinks on {day} from {time}.",
                "Thank you for {count} wonderful years, for your loyalty, and for every kind word!",
            ),
        ),
    ),
)
