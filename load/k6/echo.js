// Echoes: each user has one connection, and asks again as soon as it is answered.
//
//   k6 run -e URL=http://127.0.0.1:8000 -e TOKENS=$PWD/tokens.txt load/k6/echo.js

import { check } from "k6";
import { Connection } from "./switchboard.js";

export { options } from "./switchboard.js";

export default () =>
  Connection.run(async (connection) => {
    for (let i = 0; i < 100; i++) {
      const { data } = await connection.request(100, { i });
      check(data, { "the same comes back": (data) => data.i === i });
    }
  });
