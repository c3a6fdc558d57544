//! Why the server ends a connection: one reason, one close code, one metric label.

use tokio_tungstenite::tungstenite::protocol::{CloseFrame, frame::coding::CloseCode};

/// The end of a connection. Not an error of a request: that is answered, and the connection lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseReason {
    /// The client closed.
    Normal,
    /// The server drains.
    GoingAway,
    /// The client broke RFC 6455.
    ProtocolError,
    /// A data frame of the other format's kind.
    WrongKind,
    /// A text frame that is not UTF-8.
    NotUtf8,
    /// A message over `WS_MAX_MESSAGE_BYTES`, or a first message over 20 KiB.
    TooBig,
    /// The user has `WS_MAX_CONNECTIONS_PER_USER` connections.
    ConnectionLimit,
    /// A newer connection of its user took its place (`WS_CONNECTION_POLICY`).
    Replaced,
    /// The address has failed to authenticate too often: the token was not looked at.
    TooManyFailures,
    /// `WS_MAX_EXPULSIONS` connections of the user were closed for what their clients did.
    TooManyExpulsions,
    /// `WS_MAX_STRIKES` refused messages or control frames within a minute; or too many control frames before
    /// the auth frame.
    TooManyStrikes,
    /// A bug, or the restart of a supervisor.
    InternalError,
    /// The token cannot be checked, because the identity provider gives no keys; or the connection limit
    /// cannot, because Redis does not answer.
    Unavailable,
    /// No or no valid authentication.
    Unauthorized,
    /// The token presented is expired.
    TokenExpired,
    /// No authentication within `WS_AUTH_TIMEOUT`.
    AuthTimeout,
    /// The token of a running connection expired.
    SessionExpired,
    /// Its session was logged out, or an administrator disconnected it.
    SessionRevoked,
    /// The push queue is full, or the client took under 1 KiB/s for `WS_WRITE_TIMEOUT`.
    SlowConsumer,
    /// No sign of life within `WS_PONG_TIMEOUT` of a ping, or a message that took too long to arrive.
    PongTimeout,
    /// The connection broke without a close frame.
    Abnormal,
}

impl CloseReason {
    /// Every reason, for the closed label set of `ws_disconnections_total`.
    pub const ALL: [Self; 21] = [
        Self::Normal,
        Self::GoingAway,
        Self::ProtocolError,
        Self::WrongKind,
        Self::NotUtf8,
        Self::TooBig,
        Self::ConnectionLimit,
        Self::Replaced,
        Self::TooManyFailures,
        Self::TooManyExpulsions,
        Self::TooManyStrikes,
        Self::InternalError,
        Self::Unavailable,
        Self::Unauthorized,
        Self::TokenExpired,
        Self::AuthTimeout,
        Self::SessionExpired,
        Self::SessionRevoked,
        Self::SlowConsumer,
        Self::PongTimeout,
        Self::Abnormal,
    ];

    /// The code on the wire; 1006, which never travels, for a broken connection.
    pub fn code(self) -> u16 {
        match self {
            Self::Normal => 1000,
            Self::GoingAway => 1001,
            Self::ProtocolError => 1002,
            Self::WrongKind => 1003,
            Self::Abnormal => 1006,
            Self::NotUtf8 => 1007,
            Self::ConnectionLimit
            | Self::Replaced
            | Self::TooManyFailures
            | Self::TooManyExpulsions
            | Self::TooManyStrikes => 1008,
            Self::TooBig => 1009,
            Self::InternalError | Self::Unavailable => 1011,
            Self::Unauthorized | Self::TokenExpired => 4001,
            Self::AuthTimeout => 4002,
            Self::SessionExpired => 4003,
            Self::SessionRevoked => 4004,
            Self::SlowConsumer => 4005,
            Self::PongTimeout => 4006,
        }
    }

    /// The reason on the wire, in words.
    pub fn text(self) -> &'static str {
        match self {
            Self::Normal => "",
            Self::GoingAway => "server going away",
            Self::ProtocolError => "protocol error",
            Self::WrongKind => "wrong frame kind for this format",
            Self::NotUtf8 => "text is not UTF-8",
            Self::TooBig => "message too large",
            Self::ConnectionLimit => "too many connections for this user",
            Self::Replaced => "replaced by a newer connection",
            Self::TooManyFailures => "too many failed authentications",
            Self::TooManyExpulsions => "too many connections of this user were closed",
            Self::TooManyStrikes => "too many refused messages",
            Self::InternalError => "internal error",
            Self::Unavailable => "not available",
            Self::Unauthorized => "unauthorized",
            Self::TokenExpired | Self::SessionExpired => "token expired",
            Self::AuthTimeout => "authentication timeout",
            Self::SessionRevoked => "session revoked",
            Self::SlowConsumer => "slow consumer",
            Self::PongTimeout => "no pong, or a message that is late",
            Self::Abnormal => "connection lost",
        }
    }

    /// Whether the server ended a connection that its client would have kept, for something that the
    /// client did or no longer may.
    pub fn is_forced(self) -> bool {
        match self {
            Self::ProtocolError
            | Self::WrongKind
            | Self::NotUtf8
            | Self::TooBig
            | Self::Replaced
            | Self::TooManyStrikes
            | Self::Unauthorized
            | Self::SessionExpired
            | Self::SessionRevoked
            | Self::SlowConsumer => true,
            // Refused before there was a connection.
            Self::ConnectionLimit
            | Self::TooManyFailures
            | Self::TooManyExpulsions
            | Self::TokenExpired
            | Self::AuthTimeout
            | Self::Unavailable => false,
            Self::Normal
            | Self::GoingAway
            | Self::InternalError
            | Self::PongTimeout
            | Self::Abnormal => false,
        }
    }

    /// Whether the server ended a connection for what its client sent.
    pub fn is_expulsion(self) -> bool {
        matches!(
            self,
            Self::ProtocolError
                | Self::WrongKind
                | Self::NotUtf8
                | Self::TooBig
                | Self::TooManyStrikes
                | Self::Unauthorized
        )
    }

    /// The `code` of the error frame that goes ahead of the close frame, where there is one.
    pub fn error_code(self) -> Option<&'static str> {
        match self {
            Self::Unavailable => Some("unavailable"),
            Self::Unauthorized => Some("unauthorized"),
            Self::TokenExpired => Some("token_expired"),
            Self::AuthTimeout => Some("auth_timeout"),
            Self::ConnectionLimit => Some("connection_limit"),
            Self::TooManyFailures | Self::TooManyExpulsions => Some("rate_limit_exceeded"),
            _ => None,
        }
    }

    /// The `code` label of `ws_disconnections_total`.
    pub fn label(self) -> String {
        match self {
            Self::Abnormal => "abnormal".into(),
            reason => reason.code().to_string(),
        }
    }

    /// The close frame to send; none where the socket is beyond use or the client closed first.
    pub fn frame(self) -> Option<CloseFrame> {
        match self {
            Self::Normal | Self::Abnormal => None,
            reason => Some(CloseFrame {
                code: CloseCode::from(reason.code()),
                reason: reason.text().into(),
            }),
        }
    }
}
